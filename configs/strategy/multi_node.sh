#!/bin/bash
# FSDP2 on two nodes of eight GPUs under SLURM. Lightning reads rank and address from SLURM's own variables:
#
#   sbatch configs/strategy/multi_node.sh
#
# Without SLURM, run on each node, with MASTER_ADDR naming the first:
#
#   torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$MASTER_ADDR:29500 \
#       main.py fit --config milora.yaml --config strategy/fsdp2.yaml --trainer.num_nodes=2 --trainer.devices=8
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8     # one task for each GPU: as many as trainer.devices
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=SIGUSR1@90     # 90 s before the time is up Lightning saves and requeues the job, which goes on

srun python main.py fit --config milora.yaml --config strategy/fsdp2.yaml \
  --trainer.num_nodes=2 --trainer.devices=8

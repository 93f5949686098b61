"""Private APIs of other packages, one file for each package, with the version in which they were read.

This is the folder to check after an upgrade. The other packages are imported by the functions, or not at all; only
torch is there already.
"""

USED_IN_PLACE = {
    # torch.nn.Module's own tables, whose public iterators leave out None, and what is registered twice; its seams for
    # subclasses. All of them as old as the class, and used by everybody.
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_apply",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "_metadata",
    # How often a tensor was written to, as torch's notes on autograd describe it.
    "_version",
    # Attributes of Lightning's strategies and LightningCLI, and of jsonargparse's parsers, in subclasses of ours.
    "_data_parallel_size",
    "_tensor_parallel_size",
    "_save_distributed_checkpoint",
    "_state_dict_type",
    "_registered_strategies",
    "_parser",
    "_get",
    "_subcommand_parsers",
    "_run_subcommand",
    "_prepare_subcommand_kwargs",
    "_parse_ckpt_path",
    "_call_batch_hook",
    "_split_lines",
    "_actions",
    "_typehint",
    # typing's mark of a protocol.
    "_is_protocol",
}
"""Private names that stand where they are needed, because a function around each would say less than the name."""

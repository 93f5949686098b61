"""Private APIs of other packages, one file per package, with the version in which they were read.

Check this folder after an upgrade. Packages other than torch are imported inside functions only.
"""

USED_IN_PLACE = {
    # torch.nn.Module's tables, because the public iterators skip None and second registrations, and its hooks for
    # subclasses. All of them are as old as the class and widely used.
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_apply",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "_metadata",
    # A tensor's version counter, described in torch's notes on autograd.
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
    # typing's attribute of protocols.
    "_is_protocol",
}
"""Private names that are used directly, because wrapper functions would be less clear than the names."""

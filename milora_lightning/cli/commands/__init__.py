"""The commands: those of Lightning's CLI, and one file for each other command, which is imported when needed.

A command is a function whose arguments are its options, described in its docstring. If the first is called ``fit``, the
command also takes the options of ``fit``: all options that it does not define are passed on as a list.
"""

LIGHTNING = {
    "fit": "Fine-tune a model.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Measure a checkpoint on the test data.",
    "predict": "Answer the prompts of the test data, and write the answers to a file.",
}
"""What each subcommand of Lightning's CLI does."""

COMMANDS = {
    "preview": "milora_lightning.cli.commands.preview:preview",
    "compare": "milora_lightning.cli.compare:compare",
    "continual": "milora_lightning.cli.continual:continual",
    "chat": "milora_lightning.cli.commands.chat:chat",
    "generate": "milora_lightning.cli.commands.generate:generate",
    "export": "milora_lightning.cli.commands.export:export",
    "evaluate": "milora_lightning.cli.commands.evaluate:evaluate",
    "ranks": "milora_lightning.cli.commands.ranks:ranks",
    "analyze": "milora_lightning.cli.commands.analyze:analyze",
    "env": "milora_lightning.cli.commands.env:env",
}
"""Where the function of each other command is."""

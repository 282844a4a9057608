"""The commands: each file parses arguments, calls the library and prints what it answers.

``main.py`` has the table of commands; ``nybble NAME`` imports ``cli/NAME.py`` alone, which offers
``add_arguments(parser)`` and ``run(arguments) -> exit code``. Results go to standard output, notes
and progress to standard error. Heavy libraries are imported inside functions, never at the top.
"""

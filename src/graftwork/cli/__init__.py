"""The command line. main.py starts quickly and imports a verb's module only when that verb runs."""

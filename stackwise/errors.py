"""The one exception for what a person can put right."""


class UserError(Exception):
    """Bad input of any kind: a parameter, a file, an artifact.

    The message names the file or the parameter path, the value, what was expected and what to do. Scripts and the
    Snakefile print it as one `error: ...` and exit with code 1, without a traceback.
    """

"""What notebooks work with: the library's parts without an engine. `stackwise.api` names them all."""

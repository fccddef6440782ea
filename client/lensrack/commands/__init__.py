"""The commands of `lensrack`, a file for each thing they are about; `cli` puts them together."""

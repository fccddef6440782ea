"""The commands of `lensrack`, a file for each topic; `cli` combines them."""

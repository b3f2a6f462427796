"""What clients ask for: the fields of the API, checked and turned into prompts and sampling. No I/O."""

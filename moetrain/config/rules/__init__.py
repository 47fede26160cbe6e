"""Rules across fields of a config, one function a rule, by what they are about."""

"""Whether this machine's drivers keep what their sources say: each rule is a row, each row runs in fresh processes."""

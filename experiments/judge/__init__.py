"""A judge for nano that needs no network and no language model: the protocol is real, the verdict is a rule."""

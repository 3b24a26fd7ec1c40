"""One file a model family; its name is the name of its yaml in conf/model."""

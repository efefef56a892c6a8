"""Published claims of this field as small files, each checked by one command (`graft claims`)."""

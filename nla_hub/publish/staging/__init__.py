"""What is to be published: what lies in a directory, under which names and licence, in which form."""

"""`python -m nla_hub` is the command `nla-hub`."""

from nla_hub.cli.app import main

if __name__ == "__main__":
    main()

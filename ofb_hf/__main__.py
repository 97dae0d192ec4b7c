"""`python -m ofb_hf COMMAND ...` is the same as `ofb-hf COMMAND ...`."""

from ofb_hf_command import main

if __name__ == "__main__":
    main()

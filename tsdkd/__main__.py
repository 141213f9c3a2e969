"""`python -m tsdkd`, the form that torchrun and accelerate launch."""

from tsdkd.cli import main

if __name__ == "__main__":
    main()

"""`tsdkd plan`: disk, memory and time of a chain of commands, from model shapes and measured rates."""

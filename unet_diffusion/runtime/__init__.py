"""What every room stands on: random numbers, files, processes, signals, the machine, and the words of messages."""

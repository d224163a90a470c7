"""A transport that a machine has not got, for that machine: the channel is opened here, and one end handed over.

    client.py    in migctl: starts the process, hands what it opened to the source, answers what it asks
    process.py   a process of its own, which migctl's end does not touch: opens the channel, hands it to a destination
    words.py     what the two say to each other
    pump.py      in that process: bytes both ways, where the channel is no plain socket; who may run the machine
    record.py    what became of it, for `migctl status`

A channel that is one socket goes to the machine itself (`fd:`), and the process ends.
"""

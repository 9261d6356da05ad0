"""Processes that own an Ascend card, and what the daemon needs to start, use and replace them.

The daemon itself never touches a device. Each card has a sender, which offers memory of this host's instances to other
cards, and receivers, which fill memory of this host's instances from other cards. Both are child processes (`child`),
disposable, each with one device context and one datasystem client. The datasystem cannot cancel an overdue transfer, so
its receiver is killed; sources live in the sender and go on serving.
"""

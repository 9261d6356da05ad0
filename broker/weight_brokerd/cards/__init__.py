"""Processes that own an Ascend card, and what the daemon needs to start, use and replace them.

The daemon itself never touches a device. Each card has a sender, which offers memory of this host's instances to other
cards, and receivers, which fill memory of this host's instances from other cards. Both are children (`child`): spawned,
with one device context and one datasystem client each, and disposable. An overdue transfer cannot be cancelled in the
engine, so its receiver is killed; sources live in the sender and go on serving.
"""

"""The proof: asks the drivers of this machine what their contracts say, and writes down what they answer.

A driver is a module of `families`: its rows, how one of them is run, the machine's facts, and who else uses the cards.
Everything else here knows no driver.
"""

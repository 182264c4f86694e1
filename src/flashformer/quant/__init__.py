"""How weights are stored: formats, quantisation, and the order of codes in memory."""

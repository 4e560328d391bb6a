"""What is measured: rates of predictions, backdoor effects inside the network, and the cost of a stage."""

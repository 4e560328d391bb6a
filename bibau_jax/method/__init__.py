"""The paper's bricks as functions of arrays and pytrees: no configs, no networks, no devices."""

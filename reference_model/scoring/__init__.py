"""How good a prediction is: metrics, protocol, evaluation."""

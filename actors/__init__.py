"""Who does the work on the cluster: agents, tools, replicas and the engine behind them."""

"""Run the series of notebooks and show what came of it: runner, jobs, cluster, reports, command line."""

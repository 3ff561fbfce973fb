"""A run, or several, as one HTML page: what its folder holds, as curves, heat maps and tables. May import everything in
`vimscale` below `training`, and the guard's reports.
"""

"""What the notebooks share: experiments on named pairs of runs, tables and pictures of results, claims and scorecard.

It builds on `repairlib`, which nothing here is needed for.
"""

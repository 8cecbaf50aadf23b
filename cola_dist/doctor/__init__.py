"""What a machine or cluster is like before a long run, and what to mend there."""

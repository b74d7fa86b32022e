"""How the residual is steered: controllers that act, methods that find them, the statistics of
stage 1, the policy of stage 2 and the stages of its logits.

A method sees an experiment through `workspace.Workspace` and hands over an answerer.
"""

"""What happens to the policy's logits on the way to an action: fusion with stage 1's score,
activation, threshold, noise, mask, in the order that `order` says.
"""

"""Audit of a series of checkpoints that anybody published: the revisions of a hub repository, folders, or our own."""

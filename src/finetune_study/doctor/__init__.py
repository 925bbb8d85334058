"""Is this cluster ready for a study? What is wrong with it, and how is it mended?

`login` and `limits` check what a login node can see, `probe` submits one short job for each hardware entry, `node` and
`rank` are what runs there, `judge` compares what they found with the config, `describe` writes it down.
"""

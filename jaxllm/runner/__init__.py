"""The device: shapes, KV pages, packed inputs, the jitted step, the sampler, and ModelRunner, which runs plans."""

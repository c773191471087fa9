"""Tasks touch the world: storage, processes, clocks. They import models, never flows."""

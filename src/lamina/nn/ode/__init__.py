"""Neural ODEs and SDEs that say what their solves cost, and the local estimates that keep the cost down.

block     `NeuralODE`, on torchdiffeq
sde       `NeuralSDE`, on torchsde
step      one Runge-Kutta step, its error and stiffness, for any solver
sde_step  one stochastic step and its error
field     vector fields that see the time
recording  one more point of every solve of a model
solve     the watched solve; tableau: coefficients
"""

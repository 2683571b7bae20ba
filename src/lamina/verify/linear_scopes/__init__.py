"""The rules of a frozen pass, of every torch function one.

call        one call, its arguments at x0 and the probes beside them
units       pointwise units and normalisations
products    products, attention, quotients: one factor stays at x0
selections  pools and maxima; what is taken by its tangent
table       which of them a function has, by its name
"""

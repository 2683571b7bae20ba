"""HyperZZW: kernels that a small network computes from coordinates, and operators that multiply them with the maps.

coordinate_kernel  the slow net: a kernel as a function of position, at any size
convolution     convolution by such a kernel; depthwise convolution, direct or by FFT
global_product  rows of z * W meet columns of z; how far the slow kernels of a network are apart
local           a depthwise kernel that depends on the maps
gates           sigmoid gates of channels and positions, the recursive gated unit
group_norm      groups of channels, standardised over the batch or image by image in turn
block           the slow-fast block of Terminator
"""

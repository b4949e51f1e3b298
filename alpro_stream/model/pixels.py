"""From uint8 frames to what the video encoder reads, and blacking out for the prompter.

Legend: B clips, T frames, H W pixels, C colours.
"""

import torch
from torch import Tensor

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], as CLIP uses them."""


def normalise(frames_BTHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns uint8 RGB frames into video_BTCHW with zero mean and unit deviation, contiguous.

    Computed in float32 and rounded once to `dtype`.
    """
    # The copy to another layout is made while a value is still one byte.
    video_BTCHW = frames_BTHWC.permute(0, 1, 4, 2, 3).contiguous().float().div_(255)
    # Plain numbers: tensors of them would be copied to the device, which then waits, in every step.
    for colour, (mean, std) in enumerate(zip(PIXEL_MEAN, PIXEL_STD, strict=True)):
        video_BTCHW[:, :, colour].sub_(mean).div_(std)
    return video_BTCHW.to(dtype)


def crop_outside_black(frames_BTHWC: Tensor, boxes_B4: Tensor, patch_size: int) -> Tensor:
    """A copy of uint8 frames in which everything outside each clip's box is black (0, before normalisation).

    Args:
        frames_BTHWC: uint8 frames.
        boxes_B4: top, left, height, width in patches; the same box for all frames of a clip.
        patch_size: side of a patch in pixels.
    """
    height, width = frames_BTHWC.shape[2:4]
    inside_BHW = inside_box(boxes_B4 * patch_size, height, width)
    return frames_BTHWC.masked_fill(~inside_BHW[:, None, :, :, None], 0)


def inside_box(boxes_B4: Tensor, height: int, width: int) -> Tensor:
    """True at the cells of a (height, width) grid that lie in each box (top, left, height, width); (B, H, W)."""
    top, left, box_height, box_width = boxes_B4[:, :, None].unbind(1)
    row = torch.arange(height, device=boxes_B4.device)
    column = torch.arange(width, device=boxes_B4.device)
    rows_BH = (row >= top) & (row < top + box_height)
    columns_BW = (column >= left) & (column < left + box_width)
    return rows_BH[:, :, None] & columns_BW[:, None, :]

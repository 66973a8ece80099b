// float16 and bfloat16 as bits, to and from float, rounded to nearest with ties to even: on every machine the same.
#pragma once

#include "float_math.h"

namespace detr {

DETR_HD float from_bfloat16(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }

DETR_HD float from_float16(uint16_t x) {
  // Exponent and mantissa in place, then a multiplication by 2^112 corrects the bias, denormal numbers included.
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(0x77800000));
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(special | uint32_t(x & 0x8000) << 16);
}

DETR_HD uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DETR_HD uint16_t to_float16(float x) {
  const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {  // below the normal range: adding 0.5 makes the hardware round at 2^-24
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace detr

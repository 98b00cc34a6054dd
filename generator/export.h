/* What a product shows: its other symbols are hidden. */
#pragma once

#define PA_EXPORT __attribute__((visibility("default")))

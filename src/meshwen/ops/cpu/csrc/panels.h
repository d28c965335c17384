// SPDX-License-Identifier: Apache-2.0
//
// How weights lie in memory: see `meshwen.ops.cpu.panels`, which packs them.

#ifndef MESHWEN_PANELS_H
#define MESHWEN_PANELS_H

#define COLUMNS 32                // of a panel
#define STEP 4                    // bytes of a column in a step
#define STEP_BYTES (COLUMNS * STEP)
#define GROUP 32                  // numbers of int8 that share a scale
#define GROUP_STEPS (GROUP / STEP)

#endif

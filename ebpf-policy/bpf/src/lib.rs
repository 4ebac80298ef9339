//! The policy verdict: one function from packet and maps to allow or deny.
//!
//! It compiles for the kernel (the programs in `main.rs`) and for the host, where the same code runs over maps in memory and is
//! compared with the reference evaluator. Nothing here allocates, panics or recurses.

#![no_std]

pub mod layout;
pub mod parse;
pub mod track;
pub mod verdict;

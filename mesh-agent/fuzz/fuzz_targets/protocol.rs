#![no_main]

#[path = "../noise_checks.rs"]
mod noise_checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| noise_checks::protocol(data));

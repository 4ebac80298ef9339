#![no_main]

#[path = "../lanes_checks.rs"]
mod lanes_checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanes_checks::lanes(data));

//! libFuzzer's way into [`vmbus_fuzz::vhdx`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::vhdx(data));

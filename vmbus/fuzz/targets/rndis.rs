//! libFuzzer's way into [`vmbus_fuzz::rndis`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::rndis(data));

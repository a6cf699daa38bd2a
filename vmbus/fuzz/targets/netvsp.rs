//! libFuzzer's way into [`vmbus_fuzz::netvsp`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::netvsp(data));

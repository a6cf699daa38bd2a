//! libFuzzer's way into [`vmbus_fuzz::bus_messages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::bus_messages(data));
